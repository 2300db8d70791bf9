"""Where finished films and linked pictures lie: a folder, or a bucket that several servers share."""
