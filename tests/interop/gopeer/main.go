// Command gopeer puts hashicorp/yamux behind the commands that ../README.md lists.
//
// It holds one session. What yamux logs goes to standard error as it is, because the tests judge it. Only what both
// the library of 2019 (Debian's) and its newest have is used here.
package main

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"hash"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/yamux"
)

// untilEOF is the size of a request whose payload ends with the opener's FIN.
const untilEOF = int64(-1)

// patternPeriod is prime, so that a piece of a frame that is lost, doubled or moved shows in the digest.
const patternPeriod = 65521

const defaultChunk = 64 * 1024

var pattern = makePattern()

// job asks for one stream that this side opens.
type job struct {
	Verb  string `json:"verb"`
	Size  int64  `json:"size"`
	Seed  int64  `json:"seed"`
	Chunk int    `json:"chunk"`
	Half  bool   `json:"half"`
}

// outcome tells of one stream, opened or served, what this side saw of it.
type outcome struct {
	Verb     string `json:"verb"`
	Sent     int64  `json:"sent"`
	Received int64  `json:"received"`
	SHA256   string `json:"sha256"`
	End      string `json:"end"`
}

type command struct {
	ID     int    `json:"id"`
	Do     string `json:"do"`
	Jobs   []job  `json:"jobs"`
	AtOnce int    `json:"at_once"`
	Count  int    `json:"count"`
}

type peer struct {
	session *yamux.Session

	servedLock sync.Mutex
	servedMore *sync.Cond
	served     []outcome

	// The garbage collector must not find the streams of "hold" jobs.
	heldLock sync.Mutex
	held     []*yamux.Stream
}

func main() {
	listen := flag.Bool("listen", false, "be the Yamux server: listen on a free port of 127.0.0.1")
	dial := flag.String("dial", "", "be the Yamux client: HOST:PORT to connect to")
	window := flag.Uint("window", 256*1024, "receive window of each stream")
	backlog := flag.Int("backlog", 256, "streams that wait to be accepted")
	noAccept := flag.Bool("no-accept", false, "leave all streams in the backlog")
	flag.Parse()

	config := yamux.DefaultConfig()
	config.MaxStreamWindowSize = uint32(*window)
	config.AcceptBacklog = *backlog
	// The default of 10 s is also how long a ping and a frame in the queue may take, on a machine that does more.
	config.ConnectionWriteTimeout = 30 * time.Second

	session, err := connect(*listen, *dial, config)
	if err != nil {
		fmt.Fprintln(os.Stderr, "gopeer:", err)
		os.Exit(1)
	}
	p := &peer{session: session}
	p.servedMore = sync.NewCond(&p.servedLock)
	if !*noAccept {
		go p.acceptLoop()
	}
	reply(map[string]interface{}{"event": "connected"})
	p.commandLoop()
}

func connect(listen bool, dial string, config *yamux.Config) (*yamux.Session, error) {
	if !listen {
		conn, err := net.Dial("tcp", dial)
		if err != nil {
			return nil, err
		}
		return yamux.Client(conn, config)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	defer listener.Close()
	reply(map[string]interface{}{"event": "listening", "port": listener.Addr().(*net.TCPAddr).Port})
	conn, err := listener.Accept()
	if err != nil {
		return nil, err
	}
	return yamux.Server(conn, config)
}

// --- commands ---

// commandLoop returns when standard input ends. Commands run at the same time and may answer in any order.
func (p *peer) commandLoop() {
	input := bufio.NewReader(os.Stdin)
	for {
		line, err := input.ReadBytes('\n')
		if err != nil {
			return
		}
		var c command
		if err := json.Unmarshal(line, &c); err != nil {
			fmt.Fprintln(os.Stderr, "gopeer: not a command:", err)
			os.Exit(2)
		}
		go func() {
			answer, err := p.obey(c)
			if err != nil {
				answer = map[string]interface{}{"error": err.Error()}
			}
			answer["id"] = c.ID
			reply(answer)
		}()
	}
}

func (p *peer) obey(c command) (map[string]interface{}, error) {
	switch c.Do {
	case "run":
		return map[string]interface{}{"outcomes": p.runAll(c.Jobs, c.AtOnce)}, nil
	case "served":
		return map[string]interface{}{"outcomes": p.takeServed(c.Count)}, nil
	case "ping":
		rtts := []float64{}
		for len(rtts) < c.Count {
			rtt, err := p.session.Ping()
			if err != nil {
				return nil, err
			}
			rtts = append(rtts, rtt.Seconds())
		}
		return map[string]interface{}{"rtts": rtts}, nil
	case "go_away":
		return map[string]interface{}{}, p.session.GoAway()
	case "streams":
		return map[string]interface{}{"count": p.session.NumStreams()}, nil
	case "close":
		return map[string]interface{}{}, p.session.Close()
	case "ended":
		<-p.session.CloseChan()
		return map[string]interface{}{}, nil
	}
	return nil, fmt.Errorf("unknown command %q", c.Do)
}

var replyLock sync.Mutex

func reply(message map[string]interface{}) {
	line, err := json.Marshal(message)
	if err != nil {
		panic(err)
	}
	replyLock.Lock()
	defer replyLock.Unlock()
	os.Stdout.Write(append(line, '\n'))
}

// --- streams that this side opens ---

func (p *peer) runAll(jobs []job, atOnce int) []outcome {
	outcomes := make([]outcome, len(jobs))
	next := make(chan int)
	var workers sync.WaitGroup
	for i := 0; i < atOnce; i++ {
		workers.Add(1)
		go func() {
			defer workers.Done()
			for n := range next {
				outcomes[n] = p.run(jobs[n])
			}
		}()
	}
	for n := range jobs {
		next <- n
	}
	close(next)
	workers.Wait()
	return outcomes
}

func (p *peer) run(j job) outcome {
	result := outcome{Verb: j.Verb}
	request, err := requestLine(j)
	if err != nil {
		result.End = "error: " + err.Error()
		return result
	}
	stream, err := p.session.OpenStream()
	if err != nil {
		result.End = "error: " + err.Error()
		return result
	}
	payload := j.Size
	if j.Verb == "source" {
		payload = 0
	}
	written := make(chan int64, 1)
	go func() {
		var sent int64
		if _, err := io.WriteString(stream, request); err == nil {
			sent, _ = writePattern(stream, payload, j.Seed, j.Chunk)
		}
		if j.Half {
			stream.Close()
		}
		written <- sent
	}()
	if j.Verb == "push" || j.Verb == "hold" {
		result.Sent, result.End = <-written, "done"
		if j.Verb == "push" {
			stream.Close()
		} else {
			p.hold(stream)
		}
		return result
	}
	digest := sha256.New()
	result.Received, err = io.Copy(digest, onlyReader{stream})
	result.SHA256, result.End = hexDigest(digest), endOf(err)
	stream.Close()
	result.Sent = <-written
	return result
}

func (p *peer) hold(stream *yamux.Stream) {
	p.heldLock.Lock()
	defer p.heldLock.Unlock()
	p.held = append(p.held, stream)
}

func requestLine(j job) (string, error) {
	size := strconv.FormatInt(j.Size, 10)
	if j.Half {
		size = "*"
	}
	switch j.Verb {
	case "echo", "digest":
		return fmt.Sprintf("%s %s\n", j.Verb, size), nil
	case "source":
		return fmt.Sprintf("source %d %d\n", j.Size, j.Seed), nil
	case "reset":
		return fmt.Sprintf("reset %d\n", j.Size), nil
	case "push", "hold":
		return "drain\n", nil
	}
	return "", fmt.Errorf("hashicorp/yamux cannot do %q", j.Verb)
}

// --- streams that the other side opens ---

func (p *peer) acceptLoop() {
	for {
		stream, err := p.session.AcceptStream()
		if err != nil {
			return
		}
		go func() {
			result := serve(stream)
			stream.Close()
			p.servedLock.Lock()
			p.served = append(p.served, result)
			p.servedLock.Unlock()
			p.servedMore.Broadcast()
		}()
	}
}

// takeServed waits until so many streams have been served, and forgets those that it returns.
func (p *peer) takeServed(count int) []outcome {
	p.servedLock.Lock()
	defer p.servedLock.Unlock()
	for len(p.served) < count {
		p.servedMore.Wait()
	}
	taken := p.served
	p.served = nil
	if taken == nil {
		taken = []outcome{}
	}
	return taken
}

func serve(stream *yamux.Stream) outcome {
	input := bufio.NewReaderSize(stream, defaultChunk)
	line, err := input.ReadString('\n')
	if err != nil {
		return outcome{End: endOf(err)}
	}
	words := strings.Fields(line)
	result := outcome{Verb: words[0]}
	size := untilEOF
	if len(words) > 1 && words[1] != "*" {
		if size, err = strconv.ParseInt(words[1], 10, 64); err != nil {
			result.End = "error: " + err.Error()
			return result
		}
	}
	digest := sha256.New()
	switch result.Verb {
	case "echo":
		result.Received, err = copySize(io.MultiWriter(digest, stream), input, size)
		result.Sent = result.Received
	case "digest":
		if result.Received, err = copySize(digest, input, size); err == nil {
			var n int
			n, err = fmt.Fprintf(stream, "%d %s\n", result.Received, hexDigest(digest))
			result.Sent = int64(n)
		}
	case "drain":
		result.Received, err = copySize(digest, input, untilEOF)
	case "abandon":
		if _, err = io.WriteString(stream, "+"); err == nil {
			result.Received, err = copySize(digest, input, untilEOF)
		}
	case "source":
		var seed int64
		if seed, err = strconv.ParseInt(words[2], 10, 64); err == nil {
			result.Sent, err = writePattern(stream, size, seed, defaultChunk)
		}
	default:
		err = fmt.Errorf("hashicorp/yamux cannot do %q", result.Verb)
	}
	result.SHA256, result.End = hexDigest(digest), endOf(err)
	return result
}

// --- bytes ---

func makePattern() []byte {
	block := make([]byte, patternPeriod)
	x := uint32(1)
	for i := range block {
		x = x*1664525 + 1013904223
		block[i] = byte(x >> 24)
	}
	return block
}

// writePattern writes the endless repetition of the pattern, from its offset seed on.
func writePattern(w io.Writer, size, seed int64, chunk int) (int64, error) {
	if chunk <= 0 {
		chunk = defaultChunk
	}
	buffer := make([]byte, chunk)
	var sent int64
	for sent < size {
		n := int64(chunk)
		if size-sent < n {
			n = size - sent
		}
		for filled := int64(0); filled < n; {
			filled += int64(copy(buffer[filled:n], pattern[(seed+sent+filled)%patternPeriod:]))
		}
		written, err := w.Write(buffer[:n])
		sent += int64(written)
		if err != nil {
			return sent, err
		}
	}
	return sent, nil
}

func copySize(w io.Writer, r io.Reader, size int64) (int64, error) {
	if size == untilEOF {
		return io.Copy(w, onlyReader{r})
	}
	return io.CopyN(w, r, size)
}

// onlyReader hides the other methods of a reader, so that io.Copy keeps to its own buffer.
type onlyReader struct{ io.Reader }

func hexDigest(digest hash.Hash) string {
	return hex.EncodeToString(digest.Sum(nil))
}

// endOf names the way a stream ended as the README's table of commands does.
func endOf(err error) string {
	switch {
	case err == nil || errors.Is(err, io.EOF):
		return "eof"
	case errors.Is(err, yamux.ErrConnectionReset):
		return "reset"
	}
	return "error: " + err.Error()
}
