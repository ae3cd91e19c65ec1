"""What is trained: data, parameters, loss and metrics; a module a task."""
