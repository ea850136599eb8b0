"""What do the neurons do?"""
