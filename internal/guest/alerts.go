package guest

import (
	"regexp"
	"strings"
)

// Alert is a line from the guest's kernel that reports trouble.
type Alert struct {
	Line string
	// Fatal is set for trouble that no test may cause: a hung task, a bug or an oops of the kernel. I/O errors and
	// warnings may be what a test is about.
	Fatal bool
}

var (
	fatalAlert = regexp.MustCompile(`hung task|blocked for more than|BUG:|Oops|Kernel panic|general protection fault|kernel BUG at`)
	otherAlert = regexp.MustCompile(`I/O error|WARNING:|Buffer I/O|EXT4-fs error|XFS .*[Cc]orruption|detected stall`)
)

// findAlerts finds the alerts in the text of a kernel's console.
func findAlerts(console string) []Alert {
	var alerts []Alert
	for line := range strings.Lines(console) {
		line = strings.TrimRight(line, "\r\n")
		switch {
		case strings.Contains(line, "hung_task_timeout_secs"): // advice that follows each hung task
		case fatalAlert.MatchString(line):
			alerts = append(alerts, Alert{Line: line, Fatal: true})
		case otherAlert.MatchString(line):
			alerts = append(alerts, Alert{Line: line})
		}
	}
	return alerts
}
