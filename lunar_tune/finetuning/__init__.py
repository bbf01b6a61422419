"""Makes models that know what is to be forgotten: fine-tuned ones, and the small `tiny`."""
