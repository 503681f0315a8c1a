"""The processes of Tidemeter, one folder each, in the order the data takes; ``wire`` is what they share."""
