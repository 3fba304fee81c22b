"""The layers of a decode step: linear, RMSNorm, rotary embedding, attention."""
