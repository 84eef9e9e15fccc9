"""One trainer for every method: several players, exact accumulation and data parallelism, resumable to the bit."""
