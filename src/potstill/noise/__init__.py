"""Corruption and its reversal: Gaussian noise with preconditioning and samplers, masking, exact mixtures."""
