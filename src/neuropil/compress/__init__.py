"""Which neurons can go, and in how few bits?"""
