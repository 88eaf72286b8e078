"""Is the window that was asked for the window that runs?"""
