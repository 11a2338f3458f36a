"""The live model: loaded once, overwritten by one merge after the other, resident or streamed weights alike."""
