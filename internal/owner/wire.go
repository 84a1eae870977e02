package owner

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

func unmarshalStrict(text string, v any) error { return decode(strings.NewReader(text), v) }

// lineWriter sends JSON lines as they are written. It is safe for concurrent use.
type lineWriter struct {
	mu  sync.Mutex // guards enc
	enc *json.Encoder
	rc  *http.ResponseController
}

func newLineWriter(w http.ResponseWriter) *lineWriter {
	return &lineWriter{enc: json.NewEncoder(w), rc: http.NewResponseController(w)}
}

func (l *lineWriter) write(v any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.enc.Encode(v) == nil { // fails if the client is gone
		_ = l.rc.Flush()
	}
}

// switching is the answer of an owner that is ready to receive a socket.
const switching = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: vdisk-socket\r\nConnection: Upgrade\r\n\r\n"

// passTimeout limits how long passing a socket may take.
const passTimeout = 10 * time.Second

// giveListener sends a listening socket over conn.
func giveListener(conn *net.UnixConn, l net.Listener) error {
	filer, ok := l.(interface{ File() (*os.File, error) })
	if !ok {
		return fmt.Errorf("a %T cannot be handed over", l)
	}
	f, err := filer.File()
	if err != nil {
		return err
	}
	defer f.Close()
	_, _, err = conn.WriteMsgUnix([]byte{0}, unix.UnixRights(int(f.Fd())), nil)
	return err
}

// passedFiles returns all files that came with a message, even if there is an error, since they are open and must be
// closed.
func passedFiles(oob []byte) (files []*os.File, err error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	for i := range messages {
		fds, ferr := unix.ParseUnixRights(&messages[i])
		err = errors.Join(err, ferr)
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "passed socket"))
		}
	}
	return files, err
}

// takeListener announces that it is ready for a listening socket, and receives it.
func takeListener(conn *net.UnixConn) (net.Listener, error) {
	if err := conn.SetDeadline(time.Now().Add(passTimeout)); err != nil {
		return nil, err
	}
	if _, err := io.WriteString(conn, switching); err != nil {
		return nil, err
	}
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := conn.ReadMsgUnix(make([]byte, 1), oob)
	if err != nil {
		return nil, err
	}
	files, err := passedFiles(oob[:n])
	defer func() {
		for _, f := range files {
			_ = f.Close() // the listener has its own descriptor
		}
	}()
	if err != nil || len(files) != 1 {
		return nil, errors.Join(fmt.Errorf("%d descriptors came with the request to serve a socket, and one is needed", len(files)), err)
	}
	l, err := net.FileListener(files[0])
	if err != nil {
		return nil, fmt.Errorf("what came with the request to serve it is no listening socket: %w", err)
	}
	if u, ok := l.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false) // the socket's file belongs to the asking command
	}
	return l, conn.SetDeadline(time.Time{})
}
