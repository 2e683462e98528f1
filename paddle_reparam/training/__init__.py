"""What happens while a network trains: image folders, masks that move, and what a log shows."""
