"""Weight files: read without running them, written whole or not at all, loaded strictly, converted."""
