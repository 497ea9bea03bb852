"""What a machine or allocation is like before a run meets it: one line a finding, with its mend where it needs one."""
