package web

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/vdisk/vdisk/internal/testwatch"
)

// chromium is a headless browser with one page, spoken to over a pair of pipes (--remote-debugging-pipe): messages of the
// Chrome DevTools Protocol, each followed by a zero byte.
type chromium struct {
	t       *testing.T
	to      io.Writer
	session string // of the page

	mu       sync.Mutex // guards the fields below
	next     int
	waiting  map[int]chan message
	loads    chan struct{}
	problems []string // what the console, the policy and the network had to say
	asked    []string // URLs of all requests
}

type message struct {
	ID      int             `json:"id,omitempty"`
	Session string          `json:"sessionId,omitempty"`
	Method  string          `json:"method,omitempty"`
	Params  json.RawMessage `json:"params,omitempty"`
	Result  json.RawMessage `json:"result,omitempty"`
	Error   *struct {
		Message string `json:"message"`
	} `json:"error,omitempty"`
}

// startChromium starts a browser that ends with the test.
func startChromium(t *testing.T) *chromium {
	t.Helper()
	program, err := exec.LookPath("chromium")
	if err != nil {
		t.Fatal("chromium is needed: internal/tools/setup.sh web-test")
	}
	fromR, fromW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	toR, toW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run",
		"--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions", "--hide-scrollbars",
		"--force-color-profile=srgb", "--user-data-dir="+t.TempDir(), "about:blank")
	cmd.ExtraFiles = []*os.File{toR, fromW} // descriptors 3 and 4
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_, _ = toR.Close(), fromW.Close()
	c := &chromium{t: t, to: toW, waiting: map[int]chan message{}, loads: make(chan struct{}, 16)}
	ended := make(chan struct{})
	go func() { defer close(ended); c.read(fromR) }()
	t.Cleanup(func() {
		c.call("Browser.close", nil, nil)
		<-ended
		_ = toW.Close()
		if err := cmd.Wait(); err != nil && t.Failed() {
			t.Logf("%v\n%s", err, said.Bytes())
		}
	})
	var target struct{ TargetID string }
	c.call("Target.createTarget", map[string]any{"url": "about:blank"}, &target)
	var attached struct{ SessionID string }
	c.call("Target.attachToTarget", map[string]any{"targetId": target.TargetID, "flatten": true}, &attached)
	c.session = attached.SessionID
	for _, domain := range []string{"Page", "Runtime", "Log", "Network"} {
		c.call(domain+".enable", nil, nil)
	}
	return c
}

// read takes answers and events until the browser ends.
func (c *chromium) read(from io.Reader) {
	r := bufio.NewReader(from)
	for {
		text, err := r.ReadBytes(0)
		if err != nil {
			c.mu.Lock()
			defer c.mu.Unlock()
			for _, w := range c.waiting {
				close(w)
			}
			c.waiting = nil
			return
		}
		var m message
		if err := json.Unmarshal(bytes.TrimSuffix(text, []byte{0}), &m); err != nil {
			c.t.Errorf("%v: %s", err, text)
			return
		}
		c.mu.Lock()
		if w := c.waiting[m.ID]; m.ID != 0 && w != nil {
			delete(c.waiting, m.ID)
			w <- m
		} else {
			c.event(m)
		}
		c.mu.Unlock()
	}
}

// event notes what happens. The caller holds mu.
func (c *chromium) event(m message) {
	var p struct {
		Type             string
		Entry            struct{ Level, Text, URL string }
		Request          struct{ URL string }
		ExceptionDetails struct{ Text string }
	}
	_ = json.Unmarshal(m.Params, &p)
	switch m.Method {
	case "Page.loadEventFired":
		c.loads <- struct{}{}
	case "Runtime.consoleAPICalled", "Runtime.exceptionThrown":
		c.problems = append(c.problems, string(m.Params))
	case "Log.entryAdded": // violations of the policy, and requests that fail, too
		c.problems = append(c.problems, fmt.Sprintf("%s: %s %s", p.Entry.Level, p.Entry.Text, p.Entry.URL))
	case "Network.requestWillBeSent":
		c.asked = append(c.asked, p.Request.URL)
	}
}

// call calls a method, of the page if there is one.
func (c *chromium) call(method string, params, result any) {
	c.t.Helper()
	text, err := json.Marshal(params)
	if err != nil {
		c.t.Fatal(err)
	}
	m := message{Method: method, Session: c.session}
	if params != nil {
		m.Params = text
	}
	if strings.HasPrefix(method, "Browser.") {
		m.Session = ""
	}
	answer := make(chan message, 1)
	c.mu.Lock()
	c.next++
	m.ID = c.next
	if c.waiting == nil {
		c.mu.Unlock()
		return // it has ended
	}
	c.waiting[m.ID] = answer
	c.mu.Unlock()
	if text, err = json.Marshal(m); err == nil {
		_, err = c.to.Write(append(text, 0))
	}
	if err != nil {
		c.t.Error(err)
		return
	}
	a := testwatch.Wait(c.t, testwatch.Long, method, answer)
	if a.Error != nil {
		c.t.Fatalf("%s: %s", method, a.Error.Message)
	}
	if result != nil {
		if err := json.Unmarshal(a.Result, result); err != nil {
			c.t.Fatal(err)
		}
	}
}

// open opens an address.
func (c *chromium) open(url string) {
	c.t.Helper()
	c.call("Page.navigate", map[string]any{"url": url}, nil)
	testwatch.Wait(c.t, testwatch.Long, "the load of "+url, c.loads)
}

// eval evaluates an expression, and returns its value as JSON has it.
func (c *chromium) eval(expression string, v any) {
	c.t.Helper()
	var r struct {
		Result           struct{ Value json.RawMessage }
		ExceptionDetails json.RawMessage
	}
	c.call("Runtime.evaluate", map[string]any{"expression": expression, "returnByValue": true, "awaitPromise": true}, &r)
	if r.ExceptionDetails != nil {
		c.t.Fatalf("%s: %s", expression, r.ExceptionDetails)
	}
	if err := json.Unmarshal(r.Result.Value, v); err != nil && len(r.Result.Value) > 0 {
		c.t.Fatalf("%s: %v", expression, err)
	}
}

// shape makes the page so wide, and light or dark.
func (c *chromium) shape(width, height int, scheme string) {
	c.t.Helper()
	c.call("Emulation.setDeviceMetricsOverride", map[string]any{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}, nil)
	c.call("Emulation.setEmulatedMedia", map[string]any{"features": []map[string]string{{"name": "prefers-color-scheme", "value": scheme}}}, nil)
}

// shoot writes a picture of the whole page to a file in the folder that VDISK_WEB_SHOTS names, if it does.
func (c *chromium) shoot(name string) {
	c.t.Helper()
	dir := os.Getenv("VDISK_WEB_SHOTS")
	if dir == "" {
		return
	}
	var shot struct{ Data string }
	c.call("Page.captureScreenshot", map[string]any{"format": "png", "captureBeyondViewport": true}, &shot)
	picture, err := base64.StdEncoding.DecodeString(shot.Data)
	if err == nil {
		err = os.MkdirAll(dir, 0o755)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, name+".png"), picture, 0o644)
	}
	if err != nil {
		c.t.Fatal(err)
	}
}

// clean expects no problem so far, and no request to anybody else.
func (c *chromium) clean(base string) {
	c.t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, p := range c.problems {
		c.t.Error(p)
	}
	if i := slices.IndexFunc(c.asked, func(url string) bool { return !strings.HasPrefix(url, base) && url != "about:blank" }); i >= 0 {
		c.t.Errorf("the page asks for %s", c.asked[i])
	}
	c.problems = nil
}
