"""Bytes of a picture -> uint8 pixels for the model."""
