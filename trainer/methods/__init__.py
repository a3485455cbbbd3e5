"""Ways to distil, one file each; `trainer.methods.method` chooses among them."""
