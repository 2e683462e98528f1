"""The layers, one paper a file; importing this package registers them."""
