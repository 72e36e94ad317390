"""Reading models: plain ones in every supported packaging, and what fewbit itself writes."""
