package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"unicode/utf8"
)

// hostile is a name that another program may have.
const hostile = "a\x1b]0;x\x07\x1b[2Jb\u009b31m\u202e\U000e0041\xff\x7f größe"

// TestForeignText: names of other programs do not reach the terminal unescaped, and do not make lines.
func TestForeignText(t *testing.T) {
	for name, show := range map[string]func(a *app) error{
		"table":  func(a *app) error { return a.table(headings("A"), [][]string{{hostile + "\nx\ty"}}, false) },
		"script": func(a *app) error { return a.table(nil, [][]string{{hostile + "\nx\ty"}}, true) },
		"fields": func(a *app) error { return a.fields([][2]string{{"owner", hostile + "\nx\ty"}}) },
		"note":   func(a *app) error { a.note("held by %s", hostile+"\nx\ty"); return nil },
		"error":  func(a *app) error { a.fail(errors.New(hostile + "\nx\ty")); return nil },
		"json": func(a *app) error {
			a.json = true
			return a.print(map[string]string{"command": hostile}, nil)
		},
		"error in JSON": func(a *app) error { a.json = true; a.fail(errors.New(hostile)); return nil },
	} {
		var out bytes.Buffer
		a := &app{stdout: plainWriter{&out}, stderr: plainWriter{&out}}
		if err := show(a); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		got := out.String()
		if i := strings.IndexAny(got, "\x1b\x07\x7f\u009b\u202e\U000e0041"); i >= 0 || !utf8.ValidString(got) || !strings.Contains(got, "größe") {
			t.Errorf("%s: %q", name, got)
		}
		if a.json {
			var back map[string]any
			if err := json.Unmarshal(out.Bytes(), &back); err != nil {
				t.Errorf("%s is no JSON: %v: %s", name, err, got)
			} else if text, _ := back["command"].(string); name == "json" && text != strings.ToValidUTF8(hostile, "\ufffd") {
				t.Errorf("%s comes back as %q", name, text)
			}
			continue
		}
		if lines := strings.Count(strings.TrimSuffix(got, "\n"), "\n"); name != "table" && lines != 0 || name == "table" && lines != 1 {
			t.Errorf("%s has lines of its own: %q", name, got)
		}
	}
}
