package ublk

// SetIOFlusher marks every thread of the process as one that writes back memory (PR_SET_IO_FLUSHER). It is called
// before the first device is made.
func SetIOFlusher() error { return errNotBuilt }

// RestsOn tells the ids of the ublk devices below the file system that path is on.
func RestsOn(path string) ([]int, error) { return nil, errNotBuilt }
