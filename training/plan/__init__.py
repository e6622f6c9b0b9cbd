"""The planner: what an optimizer costs per chip."""
