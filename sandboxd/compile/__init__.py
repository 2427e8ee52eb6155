"""Pure: (Policy, Host) to a setup plan, and (Job) to an exec plan."""
