"""What will be trained, looked at before it is: the rows, their lengths, copies and faults."""
