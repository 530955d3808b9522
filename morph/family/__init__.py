"""Families of students: networks drawn from random graphs, and the search for the family that learns best."""
