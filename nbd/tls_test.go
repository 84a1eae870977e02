package nbd

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vdisk/vdisk/internal/testpki"
	"github.com/vdisk/vdisk/internal/testwatch"
)

// pki are an authority, and folders with the files of a server and a client of its own.
type pki struct {
	*testpki.Authority
	server, client string
}

func newPKI(tb testing.TB) pki {
	tb.Helper()
	a, err := testpki.New("tests")
	if err != nil {
		tb.Fatal(err)
	}
	p := pki{a, tb.TempDir(), tb.TempDir()}
	if err := errors.Join(a.Server(p.server), a.Client(p.client)); err != nil {
		tb.Fatal(err)
	}
	return p
}

// config returns the configuration of a server or client from the files in a folder.
func (p pki) config(tb testing.TB, dir, who string) *tls.Config {
	tb.Helper()
	ca, err := os.ReadFile(filepath.Join(dir, "ca-cert.pem"))
	if err != nil {
		tb.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, who+"-cert.pem"), filepath.Join(dir, who+"-key.pem"))
	if err != nil {
		tb.Fatal(err)
	}
	return &tls.Config{
		Certificates: []tls.Certificate{pair}, RootCAs: pool, ServerName: "localhost",
		ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert,
	}
}

// startTLS begins TLS on a connection that has greeted.
func (c *client) startTLS(config *tls.Config) error {
	c.tb.Helper()
	c.option(optStartTLS)
	c.wantOptReply(optStartTLS, repAck)
	secure := tls.Client(c.Conn, config)
	c.Conn = secure
	return secure.Handshake()
}

// greetTLS greets, and begins TLS.
func (c *client) greetTLS(config *tls.Config) {
	c.tb.Helper()
	c.secure = config
	c.greet(3)
}

// goTo opens the export disk on a connection that has greeted, and returns its flags.
func (c *client) goTo(structured bool) uint16 {
	c.tb.Helper()
	if c.structured = structured; structured {
		c.option(optStructuredReply)
		c.wantOptReply(optStructuredReply, repAck)
	}
	c.option(optGo, str("disk"), u16(0))
	info := []byte(c.wantOptReply(optGo, repInfo))
	c.wantOptReply(optGo, repInfo)
	c.wantOptReply(optGo, repAck)
	return be.Uint16(info[10:])
}

// A client can do nothing before it has begun TLS, and what it did before does not count.
func TestNothingInTheClear(t *testing.T) {
	p := newPKI(t)
	d := newRAM(1 << 20)
	s := New(serveRAM(d), Options{TLS: p.config(t, p.server, "server")})
	c := connect(t, s)
	c.greet(3)
	for id, data := range map[uint32]string{
		optList: "", optInfo: str("disk") + u16(0), optGo: str("disk") + u16(0), optStructuredReply: "", optExtendedHeaders: "",
		optListMeta: str("disk") + u32(0), optSetMeta: str("disk") + u32(0), 77: "data",
	} {
		c.option(id, data)
		c.wantOptReply(id, repErrTLSRequired)
	}
	c.option(optStartTLS, "data")
	c.wantOptReply(optStartTLS, repErrInvalid)
	if err := c.startTLS(p.config(t, p.client, "client")); err != nil {
		t.Fatal(err)
	}
	c.option(optSetMeta, str("disk"), u32(1), str(contextAllocation)) // structured replies were not negotiated
	c.wantOptReply(optSetMeta, repErrInvalid)
	c.option(optStartTLS)
	c.wantOptReply(optStartTLS, repErrInvalid)
	if flags := c.goTo(false); flags&flagSendDF != 0 {
		t.Errorf("flags %#x: structured replies from before TLS", flags)
	}
	c.alive()
	c.disconnect()

	c = connect(t, s)
	c.greet(3)
	c.option(optExportName, "disk")
	if err := c.hungUp(); !errors.Is(err, ErrProtocol) {
		t.Errorf("EXPORT_NAME: %v", err)
	}
	c = connect(t, s)
	c.greet(3)
	c.option(optAbort)
	c.wantOptReply(optAbort, repAck)
	if err := c.hungUp(); err != nil {
		t.Errorf("ABORT: %v", err)
	}
	if d.opens.Load() != 1 {
		t.Errorf("%d opens", d.opens.Load())
	}
}

// Options that somebody has put behind STARTTLS, in the clear, are no part of the session.
func TestInjectedBehindStartTLS(t *testing.T) {
	p := newPKI(t)
	d := newRAM(1 << 20)
	c := connect(t, New(serveRAM(d), Options{TLS: p.config(t, p.server, "server")}))
	c.greet(3)
	c.put(u64(magicOption), u32(optStartTLS), u32(0), u64(magicOption), u32(optGo), u32(10), str("disk"), u16(0))
	c.wantOptReply(optStartTLS, repAck)
	if _, err := io.Copy(io.Discard, c.Conn); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) { // an alert of TLS
		t.Log(err)
	}
	if err := c.ended(); err == nil || !strings.Contains(err.Error(), "TLS handshake") {
		t.Errorf("ServeConn: %v", err)
	}
	if d.opens.Load() != 0 {
		t.Error("the export was opened")
	}
}

// Who has no certificate of the authority that the server trusts gets nowhere.
func TestClientCertificates(t *testing.T) {
	p, other := newPKI(t), newPKI(t)
	d := newRAM(1 << 20)
	s := New(serveRAM(d), Options{TLS: p.config(t, p.server, "server")})
	good := p.config(t, p.client, "client")
	none := good.Clone()
	none.Certificates = nil
	foreign := good.Clone()
	foreign.Certificates = other.config(t, other.client, "client").Certificates
	server := good.Clone() // a certificate that is not for clients
	server.Certificates = p.config(t, p.server, "server").Certificates
	old := good.Clone()
	old.MinVersion, old.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
	for name, config := range map[string]*tls.Config{"none": none, "another authority's": foreign, "a server's": server, "TLS 1.1": old} {
		c := connect(t, s)
		c.greet(3)
		if err := c.startTLS(config); err == nil {
			// With TLS 1.3 the client's handshake ends before the server has looked at its certificate.
			_, _ = io.WriteString(c.Conn, u64(magicOption)+u32(optGo)+u32(10)+str("disk")+u16(0))
			if n, err := c.Read(make([]byte, 1)); n > 0 || err == nil {
				t.Errorf("%s: the server answers", name)
			}
		}
		if err := c.ended(); err == nil || !strings.Contains(err.Error(), "TLS handshake") {
			t.Errorf("%s: ServeConn: %v", name, err)
		}
	}
	if d.opens.Load() != 0 {
		t.Error("the export was opened")
	}
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		config := good.Clone()
		config.MinVersion, config.MaxVersion = version, version
		c := connect(t, s)
		c.greetTLS(config)
		c.goTo(true)
		c.alive()
		c.disconnect()
	}
}

// A server without TLS says so.
func TestNoTLS(t *testing.T) {
	c := dial(t, serveRAM(newRAM(4096)), Options{})
	c.greet(3)
	c.option(optStartTLS)
	c.wantOptReply(optStartTLS, repErrPolicy)
	c.goTo(false)
	c.alive()
}

// Clients that are slow on purpose are given up, wherever they stop: each byte that they send in time does not give them
// more of it. Others are served meanwhile.
func TestSlowHandshakes(t *testing.T) {
	p := newPKI(t)
	s := New(serveRAM(newRAM(4096)), Options{TLS: p.config(t, p.server, "server"), HandshakeTimeout: 300 * time.Millisecond})
	drip := func(c *client, text string) {
		for {
			for i := range len(text) {
				time.Sleep(10 * time.Millisecond)
				if _, err := io.WriteString(c.Conn, text[i:i+1]); err != nil {
					return
				}
			}
		}
	}
	var cs []*client
	for range 4 {
		cs = append(cs, connect(t, s))
		cs[len(cs)-1].get(18)
	}
	go drip(cs[1], u32(3)+strings.Repeat(u64(magicOption)+u32(optList)+u32(0), 1000))
	for _, c := range cs[2:] {
		c.put(u32(3))
		c.option(optStartTLS)
		c.wantOptReply(optStartTLS, repAck)
	}
	go drip(cs[3], "\x16\x03\x01\x40\x00\x01\x00\x3f\xfc\x03\x03"+strings.Repeat("x", 16000)) // a long ClientHello
	for i, c := range cs {
		if err := c.ended(); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("client %d: %v", i, err)
		}
	}
}

// Clients on their way to TLS take no place of others, and do not accumulate.
func TestUnprovenClients(t *testing.T) {
	p := newPKI(t)
	config := p.config(t, p.client, "client")
	s := New(serveRAM(newRAM(4096)), Options{TLS: p.config(t, p.server, "server"), MaxConnections: 1, unproven: 2})
	a := connect(t, s)
	a.greetTLS(config)
	a.goTo(false)
	var idle []*client
	for range 4 {
		c := connect(t, s)
		c.get(18)
		idle = append(idle, c)
	}
	for _, c := range idle[:2] {
		if err := c.ended(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("one that was displaced: %v", err)
		}
	}
	a.alive()
	b := connect(t, s)
	b.greetTLS(config)
	b.option(optGo, str("disk"), u16(0))
	b.wantOptReply(optGo, repErrPolicy) // too many connections
	b.Close()
	if err := b.ended(); !errors.Is(err, ErrTooManyConnections) {
		t.Errorf("ServeConn: %v", err)
	}
	a.disconnect()
	a = connect(t, s)
	a.greetTLS(config)
	a.goTo(false)
	a.alive()
	for _, c := range idle {
		c.Close()
		_ = c.ended()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.unproven) != 0 || s.refused != 0 || len(s.conns) != 1 {
		t.Errorf("%d unproven, %d refused, %d connections", len(s.unproven), s.refused, len(s.conns))
	}
}

// Requests and replies of all sizes, one by one and many together, cross records of TLS as they cross nothing else.
// A connection that waits holds no buffers.
func TestTransmissionOverTLS(t *testing.T) {
	p := newPKI(t)
	d := newRAM(8 << 20)
	s := New(serveRAM(d), Options{TLS: p.config(t, p.server, "server")})
	c := connect(t, s)
	c.greetTLS(p.config(t, p.client, "client"))
	c.goTo(false)
	sizes := []uint32{1, 4096, tlsRecord - simpleLen, tlsRecord, tlsRecord + 1, inlineMax, 100_000, 3 << 20}
	for i, n := range sizes {
		data := pattern(int(n), byte(i))
		c.want(0, 0, cmdWrite, 7, n, data)
		if got := c.want(0, 0, cmdRead, 7, n).data; got != data {
			t.Fatalf("%d bytes: something else was read", n)
		}
	}
	// Many small ones together, in pieces that begin and end anywhere.
	const many = 100
	present := []byte(pattern(many*4096, 77))
	if _, err := d.WriteAt(present, 1<<20); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	for i := range uint64(many) {
		b.WriteString(reqBytes(0, cmdWrite, 2*i, 4096*i, 4096) + pattern(4096, byte(i)) + reqBytes(0, cmdRead, 2*i+1, 1<<20+4096*i, 512))
	}
	for _, piece := range []int{1 << 20, 4000, 999} {
		sent := make(chan error, 1)
		go func() {
			for rest := b.Bytes(); len(rest) > 0; rest = rest[min(piece, len(rest)):] {
				if _, err := c.Write(rest[:min(piece, len(rest))]); err != nil {
					sent <- err
					return
				}
			}
			sent <- nil
		}()
		for range 2 * many {
			h := c.get(simpleLen)
			cookie := be.Uint64(h[8:])
			if errno := be.Uint32(h[4:]); errno != 0 {
				t.Fatalf("request %d: error %d", cookie, errno)
			}
			if at := int(cookie/2) * 4096; cookie%2 == 1 && !bytes.Equal(c.get(512), present[at:at+512]) {
				t.Fatalf("request %d: something else was read", cookie)
			}
		}
		if err := <-sent; err != nil {
			t.Fatal(err)
		}
		have := string(d.content())
		for i := range many {
			if have[i*4096:][:4096] != pattern(4096, byte(i)) {
				t.Fatalf("write %d: something else is there", i)
			}
		}
	}
	conn := theConn(s)
	c.request(0, cmdDisc, 0, 0, 0)
	if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF { // with an end of TLS
		t.Errorf("after DISC: %d %v", n, err)
	}
	if err := c.ended(); err != nil {
		t.Errorf("ServeConn: %v", err)
	}
	if conn.in.buf != nil || conn.batch != nil || conn.budget.used != 0 {
		t.Error("the connection holds memory")
	}
}

// A shutdown ends connections with TLS as it ends others: what is under way is answered.
func TestShutdownWithTLS(t *testing.T) {
	p := newPKI(t)
	d := newRAM(1 << 20)
	begun, release := make(chan struct{}), make(chan struct{})
	d.onFlush = func() error { close(begun); <-release; return nil }
	s := New(serveRAM(d), Options{TLS: p.config(t, p.server, "server")})
	a, unproven, negotiating := connect(t, s), connect(t, s), connect(t, s)
	for _, c := range []*client{a, negotiating} {
		c.greetTLS(p.config(t, p.client, "client"))
		c.option(optInfo, str("disk"), u16(0)) // so that the server has ended its handshake, too
		for _, typ := range []uint32{repInfo, repInfo, repAck} {
			c.wantOptReply(optInfo, typ)
		}
	}
	a.goTo(false)
	a.request(0, cmdFlush, 9, 0, 0)
	<-begun
	ended := make(chan error, 1)
	go func() { ended <- s.Shutdown(context.Background()) }()
	for !s.isClosed() {
		time.Sleep(time.Millisecond)
	}
	negotiating.option(optList)
	negotiating.wantOptReply(optList, repErrShutdown)
	close(release)
	if r := a.reply(0); r.errno != 0 || r.cookie != 9 {
		t.Errorf("%+v", r)
	}
	for _, c := range []*client{a, unproven, negotiating} {
		if err := c.ended(); !errors.Is(err, ErrServerClosed) {
			t.Errorf("ServeConn: %v", err)
		}
	}
	if err := testwatch.Wait(t, testwatch.Long, "Shutdown", ended); err != nil {
		t.Error(err)
	}
}
