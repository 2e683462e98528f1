"""What changes a network or proves that nothing changed: traced, layers put in and fused out, compared, counted."""
