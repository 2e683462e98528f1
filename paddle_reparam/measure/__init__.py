"""What takes how long, needs how much, and on which machine."""
