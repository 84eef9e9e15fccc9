"""potstill: distillation of large, slow models into small, fast or few-step ones, from a few shared parts."""

__version__ = "0.1.0"
