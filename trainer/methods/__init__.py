"""Ways to distil, one file each; `trainer.method` chooses among them."""
