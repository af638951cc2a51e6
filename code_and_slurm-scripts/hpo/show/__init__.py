"""What people look at: progress, the report and its pictures, the exported model."""
