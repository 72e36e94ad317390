"""fewbit inside other engines: one file per host."""
