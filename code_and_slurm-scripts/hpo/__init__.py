"""The plumbing shared by the scripts in the parent folder; nobody needs to edit it."""
