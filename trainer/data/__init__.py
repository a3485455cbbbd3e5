"""What the student learns from: pictures with captions, or prompts alone, turned once into latents and embeddings.

Four kinds of data are read (`sources`):

- a folder with images in it and in its subfolders; the caption of `cat.jpg` is in `cat.txt` (or `cat.caption`) beside
  it, or on a line `{"file_name": "cat.jpg", "text": "a cat"}` of `metadata.jsonl`. An image without a caption is learnt
  with the empty prompt, and counted in a note.
- webdataset tars (one `.tar`, or a folder of them): `0001.jpg` with `0001.txt` or `0001.json`.
- a folder that the `datasets` library saved to disk (needs `datasets` to be installed).
- `prompts.txt`, one prompt on each line: the teacher paints the pictures.

`python -m trainer cache` computes everything that training needs, and `distill` does it by itself on its first run
(`cache`): images go through augmentation and the VAE once, captions through the text encoders once. The results are
safetensors files in folders that are named by the hashes of all that they depend on, so another VAE, another caption or
another resolution makes a new folder, and nothing is ever mixed. Any file may be deleted: it is made again. What could
not be read is listed in `skipped.json`.
"""
