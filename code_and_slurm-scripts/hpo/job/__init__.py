"""What a job is made of: the phases of the batch script, and small programs that it runs."""
