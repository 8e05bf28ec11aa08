"""What the trainers of this package share."""
