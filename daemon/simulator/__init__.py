"""Provider simulators as a process of their own, in the providers' wire formats, with their ground truth on request."""
