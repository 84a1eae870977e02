package ublk

// StopForTest sends STOP past the Device, as another process could.
func StopForTest(id int) error {
	c, err := openControl()
	if err != nil {
		return err
	}
	return c.stop(id)
}

// KillForTest breaks the first queue of a device, as a failing ring would.
func KillForTest(d *Device, err error) { d.fail(err) }
