"""This layer checks what a caller asked for, and makes a loss of the statistics of rows."""
