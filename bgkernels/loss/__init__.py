"""What a caller asked for, checked; the objective of a row; autograd and compiled graphs."""
