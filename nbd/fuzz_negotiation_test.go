package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vdisk/vdisk/internal/fuzzcode"
	"golang.org/x/sys/unix"
)

// socketPair returns the two ends of a connection over a socket, as a server and its client have it.
func socketPair(tb testing.TB) (server, client net.Conn) {
	tb.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	var conns [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		conns[i], err = net.FileConn(f)
		if err = errors.Join(err, f.Close()); err != nil {
			tb.Fatal(err)
		}
	}
	return conns[0], conns[1]
}

// pairClient connects a client to a new server over a pair of sockets.
func pairClient(tb testing.TB, exports Exports, opts Options) *client {
	tb.Helper()
	server, nc := socketPair(tb)
	c := &client{tb: tb, Conn: nc, served: make(chan error, 1)}
	go func() { c.served <- New(exports, opts).ServeConn(context.Background(), server) }()
	_ = nc.SetDeadline(time.Now().Add(20 * time.Second)) // a test that hangs says where
	return c
}

// wantReply is a reply that a model expects. An error's text is free.
type wantReply struct {
	typ  uint32
	data string
}

// negotiationModel says what a server has to answer to each option, by the specification and by what the package's
// documentation promises beyond it.
type negotiationModel struct {
	noZeroes, structured, extended, allocation bool
	metaExport                                 string
	tls, clear                                 bool // the server insists on TLS, which has not begun
}

var negotiationNames = []string{"disk", "ro", "", "secret", "busy", "nosuch", strings.Repeat("x", maxNameLen), strings.Repeat("x", maxNameLen+1), "di\xffsk"}

// exists returns the properties of an export, or the error for it. If opens is true, the client wants to open it.
func (m *negotiationModel) exists(name string, opens bool) (size uint64, flags uint16, info [2]string, errTyp uint32) {
	flags = flagHasFlags | flagSendFlush | flagSendFUA | flagMultiConn | flagSendCache
	writable := uint16(flagSendTrim | flagSendWriteZeroes | flagSendFastZero)
	switch {
	case name == "disk":
		size, flags, info = 1<<18+512, flags|writable, [2]string{"disk", ""}
	case name == "ro":
		size, flags, info = 1<<16, flags|flagReadOnly, [2]string{"ro", "for reading"}
	case name == "busy" && !opens:
		size, flags, info = ramBlock, flags|writable, [2]string{"busy", ""}
	case name == "busy":
		return 0, 0, info, repErrPlatform
	case name == "secret":
		return 0, 0, info, repErrPolicy
	default:
		return 0, 0, info, repErrUnknown
	}
	if m.structured {
		flags |= flagSendDF
	}
	return size, flags, info, 0
}

// info returns the replies to INFO and GO.
func (m *negotiationModel) info(name string, kinds []uint16, opens bool) []wantReply {
	size, flags, info, errTyp := m.exists(name, opens)
	if errTyp != 0 {
		return []wantReply{{errTyp, ""}}
	}
	rs := []wantReply{{repInfo, u16(infoExport) + u64(size) + u16(flags)}, {repInfo, u16(infoBlockSize) + u32(1) + u32(4096) + u32(MaxPayload)}}
	asked := map[uint16]bool{}
	for _, k := range kinds {
		asked[k] = true
	}
	if asked[infoName] {
		rs = append(rs, wantReply{repInfo, u16(infoName) + info[0]})
	}
	if asked[infoDescription] && info[1] != "" {
		rs = append(rs, wantReply{repInfo, u16(infoDescription) + info[1]})
	}
	return append(rs, wantReply{repAck, ""})
}

// meta returns the replies to LIST_META_CONTEXT and SET_META_CONTEXT. malformed says that the data is not what its
// lengths say.
func (m *negotiationModel) meta(set bool, name string, queries []string, malformed bool) []wantReply {
	if !m.structured {
		return []wantReply{{repErrInvalid, ""}}
	}
	if set {
		m.allocation = false
	}
	found := !set && len(queries) == 0
	malformed = malformed || len(name) > maxNameLen
	for _, q := range queries {
		malformed = malformed || len(q) > maxNameLen
		found = found || q == contextAllocation || !set && q == "base:"
	}
	switch {
	case malformed:
		return []wantReply{{repErrInvalid, ""}}
	case !found:
		return []wantReply{{repAck, ""}}
	case set:
		m.allocation, m.metaExport = true, name
		return []wantReply{{repMetaContext, u32(metaContextID(0)) + contextAllocation}, {repAck, ""}}
	}
	return []wantReply{{repMetaContext, u32(0) + contextAllocation}, {repAck, ""}}
}

// negotiator runs a program of options against a server and the model.
type negotiator struct {
	*client
	code  fuzzcode.Code
	model negotiationModel
}

// name chooses a name, mostly one that means something.
func (n *negotiator) name() string {
	if i := int(n.code.Byte()); i < 4*len(negotiationNames) {
		return negotiationNames[i%len(negotiationNames)]
	}
	return n.code.Text(int(n.code.Byte()) % 20)
}

// spoilt damages the data of an option that has a structure, and reports whether it did. What it makes is malformed,
// whatever the data was: a byte is missing or too many.
func (n *negotiator) spoilt(data string) (string, bool) {
	switch how := n.code.Byte(); {
	case how%8 == 1 && len(data) > 0:
		return data[:len(data)-1-int(how)%len(data)], true
	case how%8 == 2:
		return data + "x", true
	}
	return data, false
}

// step sends one option and checks the answer. It returns false if that was the last.
func (n *negotiator) step() bool {
	if n.model.clear {
		return n.clearStep()
	}
	switch n.code.Byte() % 12 {
	default:
		n.put(u64(magicOption), u32(optStructuredReply), n.sized(""))
		if n.model.extended {
			n.expect(optStructuredReply, wantReply{repErrExtended, ""})
			return true
		}
		n.model.structured = true
		n.expect(optStructuredReply, wantReply{repAck, ""})
	case 1, 2:
		return n.infoOrGo()
	case 3, 4:
		n.metaContext()
	case 5:
		junk := n.code.Text(int(n.code.Byte()) % 3)
		n.put(u64(magicOption), u32(optList), n.sized(junk))
		if junk != "" {
			n.expect(optList, wantReply{repErrInvalid, ""})
			return true
		}
		// The order of the names is the exports'.
		n.expect(optList, wantReply{repServer, str("disk")}, wantReply{repServer, str("ro")}, wantReply{repAck, ""})
	case 6:
		n.option(optAbort, n.code.Text(int(n.code.Byte())%5))
		n.expect(optAbort, wantReply{repAck, ""})
		n.ends(nil)
		return false
	case 7:
		return n.exportName()
	case 8:
		id := uint32(n.code.U16())
		if id%16 == optExtendedHeaders {
			n.extendedHeaders()
			return true
		}
		if id%16 == optStartTLS {
			id = optStartTLS
		}
		if id == 0 || id > optExtendedHeaders || id == 4 || id == optStartTLS {
			typ := uint32(repErrUnsup)
			if id == optStartTLS {
				typ = repErrPolicy
			}
			if id == optStartTLS && n.model.tls {
				typ = repErrInvalid // it has begun
			}
			n.option(id, n.code.Text(int(n.code.Byte())))
			n.expect(id, wantReply{typ, ""})
		}
	case 9:
		n.put(u64(magicOption^1<<(n.code.Byte()%64)), u32(optList), u32(0))
		n.ends(ErrProtocol)
		return false
	case 10:
		id := uint32(n.code.Byte())
		n.put(u64(magicOption), u32(id), u32(maxOptionLen+1+uint32(n.code.U16())))
		n.expect(id, wantReply{repErrTooBig, ""})
		n.ends(ErrProtocol)
		return false
	case 11: // the client goes away within an option
		part := u64(magicOption) + u32(optGo) + u32(100) + n.code.Text(int(n.code.Byte())%99)
		n.put(part[:min(len(part), 1+int(n.code.Byte()))])
		_ = n.Conn.(interface{ CloseWrite() error }).CloseWrite()
		n.ends(io.ErrUnexpectedEOF)
		return false
	}
	return true
}

// clearStep is step before TLS has begun, where it must.
func (n *negotiator) clearStep() bool {
	id := uint32(n.code.Byte()) % 16
	data := n.code.Text(int(n.code.Byte()) % 20)
	n.option(id, data)
	switch {
	case id == optAbort:
		n.expect(id, wantReply{repAck, ""})
		n.ends(nil)
		return false
	case id == optExportName:
		n.ends(ErrProtocol)
		return false
	case id != optStartTLS:
		n.expect(id, wantReply{repErrTLSRequired, ""})
	case data != "":
		n.expect(id, wantReply{repErrInvalid, ""})
	default:
		n.expect(id, wantReply{repAck, ""})
		secure := tls.Client(n.Conn, fuzzPKI(n.tb).client)
		if err := secure.Handshake(); err != nil {
			n.tb.Fatal(err)
		}
		n.Conn, n.model.clear = secure, false
	}
	return true
}

// fuzzPKI returns the configurations of a server with TLS and its client.
func fuzzPKI(tb testing.TB) (c struct{ server, client *tls.Config }) {
	fuzzPKIOnce.Do(func() {
		p := newPKI(tb)
		fuzzConfigs.server, fuzzConfigs.client = p.config(tb, p.server, "server"), p.config(tb, p.client, "client")
	})
	return fuzzConfigs
}

var (
	fuzzPKIOnce sync.Once
	fuzzConfigs struct{ server, client *tls.Config }
)

func (n *negotiator) extendedHeaders() {
	junk := n.code.Text(int(n.code.Byte()) % 2)
	n.option(optExtendedHeaders, junk)
	if junk != "" {
		n.expect(optExtendedHeaders, wantReply{repErrInvalid, ""})
		return
	}
	n.model.structured, n.model.extended = true, true
	n.expect(optExtendedHeaders, wantReply{repAck, ""})
}

func (n *negotiator) sized(data string) string { return u32(uint32(len(data))) + data }

func (n *negotiator) infoOrGo() bool {
	id := uint32(optInfo + n.code.Byte()%2)
	name := n.name()
	kinds := make([]uint16, n.code.Byte()%8)
	data := str(name) + u16(uint16(len(kinds)))
	for i := range kinds {
		kinds[i] = uint16(n.code.Byte() % 6)
		data += u16(kinds[i])
	}
	data, malformed := n.spoilt(data)
	n.option(id, data)
	if malformed || len(name) > maxNameLen {
		n.expect(id, wantReply{repErrInvalid, ""})
		return true
	}
	rs := n.model.info(name, kinds, id == optGo)
	n.expect(id, rs...)
	return id == optInfo || rs[0].typ != repInfo || n.opened(name)
}

func (n *negotiator) metaContext() {
	id := uint32(optListMeta + n.code.Byte()%2)
	name := n.name()
	queries := make([]string, n.code.Byte()%4)
	data := str(name) + u32(uint32(len(queries)))
	for i := range queries {
		switch n.code.Byte() % 4 {
		case 0:
			queries[i] = contextAllocation
		case 1:
			queries[i] = "base:"
		case 2:
			queries[i] = "qemu:dirty-bitmap:"
		case 3:
			queries[i] = n.code.Text(int(n.code.Byte()) % 30)
		}
		data += str(queries[i])
	}
	data, malformed := n.spoilt(data)
	n.option(id, data)
	n.expect(id, n.model.meta(id == optSetMeta, name, queries, malformed)...)
}

// exportName sends EXPORT_NAME, which has no error but the end of the connection.
func (n *negotiator) exportName() bool {
	name := n.name()
	n.option(optExportName, name)
	size, flags, _, errTyp := n.model.exists(name, true)
	switch {
	case len(name) > maxNameLen, n.model.extended:
		n.ends(ErrProtocol)
		return false
	case errTyp != 0:
		n.ends(errAny)
		return false
	}
	want := u64(size) + u16(flags)
	if !n.model.noZeroes {
		want += strings.Repeat("\x00", exportZeroes)
	}
	if got := string(n.get(len(want))); got != want {
		n.tb.Fatalf("EXPORT_NAME: %x, want %x", got, want)
	}
	return n.opened(name)
}

// opened checks the state in which the transmission begins. It returns false: the negotiation is over.
func (n *negotiator) opened(name string) bool {
	n.structured = n.model.structured
	errno := uint32(errnoInval)
	if n.model.allocation && n.model.metaExport == name {
		errno = 0
	}
	if n.model.extended {
		c := extClient{n.client}
		c.want(errno, cmdFlagReqOne, cmdBlockStatus, 0, 512)
		c.request(0, cmdDisc, 0, 0, 0)
		n.ends(nil)
		return false
	}
	n.want(errno, cmdFlagReqOne, cmdBlockStatus, 0, 512)
	n.disconnect()
	return false
}

// expect reads the replies to an option.
func (n *negotiator) expect(id uint32, rs ...wantReply) {
	n.tb.Helper()
	for i, r := range rs {
		typ, data := n.optReply(id)
		if typ != r.typ || typ&(1<<31) == 0 && data != r.data {
			n.tb.Fatalf("option %d: reply %d is %#x %.200q, want %#x %.200q", id, i, typ, data, r.typ, r.data)
		}
	}
}

// errAny stands for any error.
var errAny = errors.New("any")

// ends checks that the server hangs up, and why.
func (n *negotiator) ends(want error) {
	n.tb.Helper()
	err := n.hungUp()
	if want == nil && err != nil || want != nil && err == nil || want != nil && want != errAny && !errors.Is(err, want) {
		n.tb.Fatalf("the connection ended with %v, want %v", err, want)
	}
}

// listedExports are an exportMap with a fixed order of names.
type listedExports struct{ exportMap }

func (e listedExports) List() ([]string, error) { return []string{"disk", "ro"}, nil }

// FuzzNegotiation is a program of options, well-formed and broken, against a real server. A model says what each must be
// answered with, and in which state the transmission begins or how the connection ends.
func FuzzNegotiation(f *testing.F) {
	f.Add([]byte{3, 0, 3, 1, 0, 1, 0, 0, 1, 1, 0, 0})                                   // structured, SET_META, GO
	f.Add([]byte{1, 1, 0, 1, 3, 1, 2, 3, 0, 1, 0, 4, 0, 0, 5, 0, 7, 0})                 // INFO, LIST, EXPORT_NAME
	f.Add([]byte{0, 7, 0})                                                              // EXPORT_NAME with zeroes
	f.Add([]byte{3, 1, 0, 3, 0, 0, 1, 0, 4, 0, 0, 1, 0, 5, 0, 0, 1, 0, 7, 0, 0, 7, 5})  // INFO of what is not there
	f.Add([]byte{2, 0, 3, 0, 0, 0, 0, 3, 1, 0, 1, 2, 1, 3, 1, 0, 1, 1, 2, 8, 0, 77, 3}) // broken SET_META, an unknown option
	f.Add([]byte{3, 0, 3, 1, 0, 1, 0, 0, 3, 1, 0, 0, 0, 1, 1, 0, 0, 0})                 // SET_META twice
	f.Add([]byte{3, 0, 3, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0})                                // SET_META for another export
	f.Add([]byte{3, 8, 11, 0, 0, 0, 3, 1, 0, 1, 0, 0, 1, 1, 0, 0})                      // EXTENDED_HEADERS, structured, SET_META, GO
	f.Add([]byte{3, 8, 11, 0, 0, 7, 0})                                                 // EXTENDED_HEADERS, EXPORT_NAME
	f.Add([]byte{3, 9, 3})                                                              // wrong magic
	f.Add([]byte{3, 10, 7, 0, 1})                                                       // too long
	f.Add([]byte{3, 11, 7, 1, 2, 3, 4, 5, 6, 7, 20})                                    // ends in the middle
	f.Add([]byte{3, 11, 3, 1, 2, 3, 15})                                                // ends behind an option's header
	f.Add([]byte{3, 5, 1, 1, 6, 2, 2, 2})                                               // LIST with data, ABORT
	f.Add([]byte{131, 7, 0, 8, 0, 5, 1, 99, 5, 0, 0, 3, 1, 0, 1, 0, 0, 1, 1, 0, 0})     // refused in the clear, STARTTLS, structured, SET_META, GO
	f.Add([]byte{131, 5, 0, 8, 5, 5, 0, 7, 0})                                          // STARTTLS twice, EXPORT_NAME
	f.Add([]byte{130, 5, 0, 11, 3, 1, 2, 3, 15})                                        // STARTTLS, and the end in the middle of an option
	f.Add([]byte{131, 7, 0, 2, 0})                                                      // ABORT in the clear
	f.Add([]byte{131, 1, 0})                                                            // EXPORT_NAME in the clear
	f.Add([]byte{4, 6, 0})                                                              // flags that nobody knows
	f.Fuzz(func(t *testing.T, program []byte) {
		if len(program) > 300 {
			return
		}
		disk, ro := newRAM(1<<18+512), newRAM(1<<16)
		exports := listedExports{exportMap{"disk": {Device: disk, Name: "disk"}, "ro": {Device: ro, Name: "ro", ReadOnly: true, Description: "for reading"}}}
		n := &negotiator{code: fuzzcode.Code{B: program}}
		flags := uint32(n.code.Byte())
		opts := Options{Workers: 2}
		if flags >= 128 {
			flags, opts.TLS = flags%8, fuzzPKI(t).server
			n.model.tls, n.model.clear = true, true
		}
		n.client = pairClient(t, exports, opts)
		defer n.Close()
		n.greet(flags)
		if flags > 3 {
			n.ends(ErrProtocol)
			return
		}
		n.model.noZeroes = flags&flagNoZeroes != 0
		goesOn := true
		for goesOn && len(n.code.B) > 0 {
			goesOn = n.step()
		}
		if goesOn {
			_ = n.Conn.(interface{ CloseWrite() error }).CloseWrite()
			n.ends(nil)
		}
		for _, d := range []*ramDevice{disk, ro} {
			if d.opens.Load() != d.closes.Load() {
				t.Fatalf("%d opens, %d closes", d.opens.Load(), d.closes.Load())
			}
		}
	})
}
