"""The few differentiable engines that papers configure."""
