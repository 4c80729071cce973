"""The node: vLLM with whole versions of one matrix resident, through vLLM's own extension points."""
