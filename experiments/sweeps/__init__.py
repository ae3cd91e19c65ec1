"""Many runs: points, their processes, searches, and learning rates as one program."""
