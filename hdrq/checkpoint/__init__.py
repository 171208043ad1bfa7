"""Files: the format of quantized models, saving and loading them, their inspection, resumable work folders."""
