package web

import (
	"bytes"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"net/http"
	"path"
	"strings"
	"time"

	"github.com/vdisk/vdisk/internal/localhttp"
)

//go:embed assets
var assets embed.FS

// policy lets the page load nothing but what this server has, and run no script but its own. So no name or other text that a
// user has chosen can become a script.
const policy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; " +
	"base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"

// headers are those of every answer.
var headers = map[string]string{
	"Content-Security-Policy":      policy,
	"X-Content-Type-Options":       "nosniff",
	"X-Frame-Options":              "DENY",
	"Referrer-Policy":              "no-referrer",
	"Cross-Origin-Opener-Policy":   "same-origin",
	"Cross-Origin-Resource-Policy": "same-origin",
	"Permissions-Policy":           "camera=(), geolocation=(), microphone=()",
	"Cache-Control":                "no-store",
}

// maxRequests is how many requests are answered at a time.
const maxRequests = 8

// guarded returns the handler of all requests, behind what keeps out those that are not for it.
func (s *server) guarded() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", s.page)
	mux.HandleFunc("GET /live", s.live)
	for _, name := range []string{"style.css", "page.js", "icon.svg"} {
		mux.HandleFunc("GET /"+name, asset(name))
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for name, value := range headers {
			w.Header().Set(name, value)
		}
		switch {
		case !localhttp.Local(r.Host):
			http.Error(w, "this page is asked for at localhost, or at the number of a loopback address", http.StatusForbidden)
			return
		case r.Method != http.MethodGet && r.Method != http.MethodHead:
			w.Header().Set("Allow", "GET, HEAD")
			http.Error(w, "the page can only be read", http.StatusMethodNotAllowed)
			return
		case foreign(r):
			http.Error(w, "this page is not for other sites", http.StatusForbidden)
			return
		}
		select {
		case s.running <- struct{}{}:
			defer func() { <-s.running }()
		default:
			w.Header().Set("Retry-After", "1")
			http.Error(w, "too many requests at a time", http.StatusServiceUnavailable)
			return
		}
		leave, ok := s.enter()
		if !ok {
			http.Error(w, "the page is ending", http.StatusServiceUnavailable)
			return
		}
		defer leave()
		mux.ServeHTTP(w, r)
	})
}

// foreign reports whether a browser asks for a page of another site, other than by a link that its user has followed. Such
// a page could not read the answer, but it could make the store work.
func foreign(r *http.Request) bool {
	switch r.Header.Get("Sec-Fetch-Site") {
	case "", "none", "same-origin":
		return false
	}
	return r.Header.Get("Sec-Fetch-Mode") != "navigate" || r.Header.Get("Sec-Fetch-Dest") != "document"
}

// asset returns the handler of a file that is a part of the program. A browser keeps it as long as it is the same.
func asset(name string) http.HandlerFunc {
	content, err := assets.ReadFile(path.Join("assets", name))
	if err != nil {
		panic(err) // a name that is wrong in this package
	}
	sum := sha256.Sum256(content)
	tag := `"` + hex.EncodeToString(sum[:8]) + `"`
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", tag)
		w.Header().Set("Cache-Control", "no-cache")
		if strings.HasSuffix(name, ".js") { // whatever the machine's list of types says
			w.Header().Set("Content-Type", "text/javascript; charset=utf-8")
		}
		http.ServeContent(w, r, name, time.Time{}, bytes.NewReader(content))
	}
}
