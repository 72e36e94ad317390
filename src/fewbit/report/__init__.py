"""What a set of models costs, measured together and written as one page: `fewbit report`."""
