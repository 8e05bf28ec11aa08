"""A kind of teacher a file: its checks, its bytes, its walk, and what policies see of it."""
