"""Published weights: reading their files safely, knowing their layouts, and making runs of them (`vitrine import`)."""
