"""What runs together: runs, sweeps, searches, reports and their command lines."""
