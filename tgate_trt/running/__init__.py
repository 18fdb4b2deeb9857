"""Running a bundle: engines and components loaded, put into a pipeline, and drawn with."""
