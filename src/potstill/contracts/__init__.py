"""The words every floor shares: errors, signals and batches, terms and losses, players, keyed randomness.

Nothing here knows a model, a file format or a method. See `docs/design.md` for the picture of the house.
"""
